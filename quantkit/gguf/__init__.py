"""The GGUF format: types and their blocks, headers, shards, splitting and merging. May import
base; offers read_header, header_bytes and the table QTYPES."""
