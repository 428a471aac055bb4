"""What every test runs under."""

import torch

# Two test processes share two cores: more threads would only get in each other's way.
torch.set_num_threads(1)
