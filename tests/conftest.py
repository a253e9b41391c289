"""Here so that tests in folders find the helpers that lie beside it."""
