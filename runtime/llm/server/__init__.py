"""LLM servers, spoken to over HTTP."""
