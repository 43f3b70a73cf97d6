"""Multiple-choice knapsacks: exact under one budget, near it under two, and the hull over all budgets."""
