"""The paper's experiments, each a set of trainings and a report of them:
`python -m mmixer_kernels.experiments NAME`."""
