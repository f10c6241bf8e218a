"""The machine and the run on it: devices, memory, stages, processes, and the one object that carries them."""
