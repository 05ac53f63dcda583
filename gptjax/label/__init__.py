"""A person ranks the replies of a model: what they are shown, what they say, and how far they agree with others."""
