"""The page of `python -m eval app`: one module per tab, each shown by Gradio."""
