"""How the models of the shapes world were made: python -m recipe.prepare."""
