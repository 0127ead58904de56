"""Inside other programs' training: a diagnosis every few epochs, by a call or by a callback of Lightning."""
