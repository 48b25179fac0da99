"""The GGUF format: types and their blocks, headers, shards, and what splitting and merging make of them. May import
base; offers read_header, header_bytes and the table QTYPES."""
