"""The integer model: what the machine computes, to the last bit, and so the accuracy that it really has."""
