from blip2c import _core
