"""Settings, options, API keys, server addresses."""
