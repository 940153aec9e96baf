"""Storage: bytes on disk that machines must agree on. No models, no process groups."""
