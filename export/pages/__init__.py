"""Results as pages and plots: the one template of every web page, and figures of matplotlib."""
