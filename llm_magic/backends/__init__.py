"""What answers: the contract of a backend, the manager, local models and servers."""
