"""Where a model meets a mesh. The model knows no mesh and `sharding` no model; here a `Network` is put together from
both, in one place for every stage, verb, planner and benchmark: attention over a sequence in parts (`context`), layers
dealt to stages (`pipeline`)."""
