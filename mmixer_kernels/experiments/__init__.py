"""The paper's experiments, each a set of trainings and what is made of them:
`python -m mmixer_kernels.experiments NAME`."""
