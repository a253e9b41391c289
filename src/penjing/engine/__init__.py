"""The engine: many requests share one model. `Engine.add`, `Engine.step`, `Engine.abort`; `process` runs it apart."""
