"""What is sent to a model: templates, expressions in braces, values as text."""
