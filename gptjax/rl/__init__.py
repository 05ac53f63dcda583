"""The arithmetic of learning from rewards and preferences (PPO, GRPO, DPO), as functions of arrays that know no model,
mesh or config: which tokens are a response (`responses`), what each of them earned (`returns`), what a step minimises
and the figures to watch (`losses`), and what changes between iterations (`control`). Stages and tests stand on it, and
it imports nothing else of gptjax.

Arrays [..., T] have one row a response and `mask` is True at its tokens, wherever in the row they lie; values outside
it, NaN included, change neither a result nor a gradient. Everything is computed in float32. Arguments that could be
taken for one another have names, since most of them have equal shapes and a wrong order would only train badly.
"""
