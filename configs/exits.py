"""Exit codes of every process of a job; the README explains them to users, `k8s/job-8gpu.yaml` acts on them."""

UNFORESEEN = 1  # an error that no other code stands for
REFUSED = 2  # configuration, input, output or model
INCOMPLETE = 3  # results
LOST = 4  # a rank, or the coordinator
DISAGREED = 5  # the ranks, among each other
DEVICE = 6  # an error or too little memory on it
TERMINATED = 143  # told to stop: 128 + SIGTERM
