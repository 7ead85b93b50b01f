"""libllama through ctypes: where it is, its structs and functions, its log, who frees what."""
