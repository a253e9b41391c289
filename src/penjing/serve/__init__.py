"""The service: OpenAI's interface over HTTP on the engine. Needs no torch."""
