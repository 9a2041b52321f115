"""The suite and the wheels on every torch that is supported: `make test-matrix`, `make wheels`."""
