"""A server of embeddings and neighbors of images. Only this subpackage imports FastAPI and uvicorn."""
