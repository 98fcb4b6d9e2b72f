"""What a cell shows: answers, Markdown, formulas, tables, messages."""
