"""An exporter: every tensor as a .npy file."""

import numpy

from sqft.errors import VerificationError


class Numpy:
    def check(self, reader):
        pass

    def write(self, reader, out):
        for name in reader.layout:
            numpy.save(out / f"{name}.npy", reader.get(name).numpy())

    def verify(self, reader, out):
        for name in reader.layout:
            if not numpy.array_equal(numpy.load(out / f"{name}.npy"), reader.get(name).numpy()):
                raise VerificationError(f"{name} was not written as it is")
        return {"tensors": len(reader.layout)}
