"""Text generation: KV cache, sampling, the decode loop, and chat sessions on top of them."""
