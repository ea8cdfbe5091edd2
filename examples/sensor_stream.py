"""A sensor's frames, each encoded as it arrives: `python examples/sensor_stream.py`"""

import torch

from mmixer_kernels import CellStream, FusedMCU, FusedMCUCell

torch.manual_seed(0)
FRAMES, FEATURES, CONTEXT, HIDDEN = 100, 6, 16, 64


def sensor():
    """Yields frames `[1, FEATURES]`, as an accelerometer and a gyroscope would."""
    for t in range(FRAMES):
        waves = torch.sin(0.1 * t * torch.arange(1, FEATURES + 1))
        yield (waves + 0.1 * torch.randn(FEATURES)).unsqueeze(0)


unit = FusedMCU(FEATURES, CONTEXT, HIDDEN)  # the unit that was trained, on whole sequences
cell = FusedMCUCell(FEATURES, CONTEXT, HIDDEN)  # one step of it: the parameters are the same
cell.load_state_dict(unit.state_dict())

context = torch.randn(1, CONTEXT)  # what the other modalities saw
stream = CellStream(cell, context)
frames, states = [], []
for frame in sensor():
    states.append(stream(frame).clone())  # the stream writes its next state over this one
    frames.append(frame)

with torch.no_grad():
    output, _ = unit(torch.stack(frames), context)
difference = (output - torch.stack(states)).abs().max()
assert difference < 1e-5
print(f"{len(states)} frames, one by one: {difference:.0e} from the whole sequence at once")

stream.reset(context=torch.randn(1, CONTEXT))  # the next sequence, from a state of zeros
print(f"the first state of the next sequence: {tuple(stream(frames[0]).shape)}")
