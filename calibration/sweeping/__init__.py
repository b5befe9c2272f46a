"""`vzip sweep`: accuracy or agreement, latency and what the LLM saves, over budgets."""
