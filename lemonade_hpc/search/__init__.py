"""The algorithm: graphs, operators on them, sampling, the Pareto front. No torch, no files, no clock."""
