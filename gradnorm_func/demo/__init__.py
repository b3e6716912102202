"""What to run first: `python -m gradnorm_func.demo`. Not imported by `import gradnorm_func`."""
