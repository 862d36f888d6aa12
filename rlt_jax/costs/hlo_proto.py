"""The parts of XLA's `HloModuleProto` that costs are computed from.

Field numbers are those of xla/service/hlo.proto and xla/xla_data.proto, which never change
once released; other fields are skipped when a module is parsed.
"""

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Of each message the fields with their numbers and types; "*" marks a repeated field.
_FIELDS = """
Module computations=3:Computation* entry=6:int
Computation name=1:str instructions=2:Instruction* id=5:int root_id=6:int
Instruction name=1:str opcode=2:str shape=3:Shape metadata=7:Metadata literal=8:Literal
Instruction parameter_number=9:int tuple_index=13:int window=15:Window
Instruction convolution=16:Convolution channel_id=26:int custom_call_target=28:str
Instruction dot=30:Dot id=35:int operand_ids=36:int* called_computation_ids=38:int*
Instruction backend_config=43:bytes replica_groups=49:Group* pairs=52:Pair*
Instruction comparison_direction=63:str attributes=68:Attributes
Instruction device_list=87:DeviceList device_mesh=93:MeshGroups
Shape element_type=2:int dimensions=3:int* tuple_shapes=4:Shape* layout=5:Layout
Layout memory_space=8:int
Metadata op_name=2:str
Literal u8s=3:bytes s32s=4:int* s64s=5:int* u32s=6:int* u64s=7:int* s8s=15:bytes
Literal s16s=17:bytes
Window dimensions=1:WindowDimension*
WindowDimension size=1:int stride=2:int padding_low=3:int window_dilation=5:int
WindowDimension base_dilation=6:int
Convolution kernel_input_feature=3:int kernel_output_feature=4:int input_spatial=11:int*
Convolution output_spatial=12:int*
Attributes map=1:Entry*
Entry key=1:str value=2:str
Dot lhs_contracting=1:int*
Group ids=1:int*
Pair source=1:int
Iota devices=2:int
DeviceList groups=1:Group* iota=2:Iota
MeshGroups mesh=1:DeviceMesh axes=2:AxisRef*
DeviceMesh axes=1:MeshAxis*
MeshAxis size=2:int
AxisRef index=1:int part=2:SubAxis
SubAxis size=2:int
"""
_Field = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "int": _Field.TYPE_INT64,
    "str": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}


def _module_class() -> Any:
    """The message class of a module."""
    file = descriptor_pb2.FileDescriptorProto(
        name="rlt_jax/hlo.proto", package="rlt_jax.hlo", syntax="proto3"
    )
    messages: dict[str, Any] = {}
    for name, *fields in map(str.split, _FIELDS.split("\n")[1:-1]):
        message = messages.get(name) or file.message_type.add(name=name)
        messages[name] = message
        for field, number, kind in (re.split("[=:]", text) for text in fields):
            repeated = kind.endswith("*")
            label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            added = message.field.add(name=field, number=int(number), label=label)
            kind = kind.rstrip("*")
            added.type = _TYPES.get(kind, _Field.TYPE_MESSAGE)
            if kind not in _TYPES:
                added.type_name = f".rlt_jax.hlo.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName("rlt_jax.hlo.Module")
    return message_factory.GetMessageClass(found)


Module = _module_class()
