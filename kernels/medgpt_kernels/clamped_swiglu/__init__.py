"""GPT-oss's gated activation on interleaved gate and up columns."""
