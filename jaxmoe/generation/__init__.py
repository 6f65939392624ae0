"""Generation: sampling, the batching engine, and jobs in JSON lines."""
