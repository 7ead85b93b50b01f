"""llama.cpp's own quantized types: their codewords, scales and bytes. Knows no checkpoint, no file and no torch."""
