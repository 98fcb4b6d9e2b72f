"""The backend that runs .gguf files in this process with llama.cpp."""
