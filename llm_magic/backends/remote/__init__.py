"""Servers: Ollama and every OpenAI-compatible one."""
