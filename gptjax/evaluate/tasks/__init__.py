"""Tasks for lm-evaluation-harness whose data lies in a folder of the user's: YAML files, and their functions."""
