"""How the demo model was trained; `python -m benchmarks.demo_model.train` trains it again."""
