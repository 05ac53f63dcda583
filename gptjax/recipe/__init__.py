"""A chain of stages by one command: what its steps are made from and which of them have still to be done (`steps`), the
doing of them (`chain`), the same questions answered by each of its models (`compare`), the page of it all (`page`), and
the small world of `configs/recipe_tiny.py` (`town`)."""

from gptjax.recipe.steps import Comparison, Recipe, load_recipe

__all__ = ["Comparison", "Recipe", "load_recipe"]
