"""Parts of the feature `budgets`."""
