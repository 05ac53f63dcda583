"""What a trained model is worth: `perplexity` of any text, tasks of lm-evaluation-harness (`harness`, with `adapter` as
its model and `tasks` for data that lies at hand), every figure with an interval (`figures`), kept as JSON (`results`)
and compared on one page (`page`); figures of what is told (`classes`) or written (`texts`) beside what people said. It
stands on `gptjax.load` and its engine, and knows no command line.
"""
