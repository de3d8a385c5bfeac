"""Triton's config.pbtxt, parsed by protobuf itself: what the schema does not have is an error."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

FIELD = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    "string": FIELD.TYPE_STRING,
    "int32": FIELD.TYPE_INT32,
    "int64": FIELD.TYPE_INT64,
    "uint32": FIELD.TYPE_UINT32,
    "uint64": FIELD.TYPE_UINT64,
    "bool": FIELD.TYPE_BOOL,
}
ENUMS = {
    "DataType": (
        "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 "
        "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16"
    ),
    "Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
}
# From model_config.proto of triton-inference-server/common, the fields that we write; text has no use for numbers.
MESSAGES = {
    "ModelTensorReshape": "int64 shape*",
    "ModelInput": "string name, DataType data_type, int64 dims*, ModelTensorReshape reshape, bool optional",
    "ModelOutput": "string name, DataType data_type, int64 dims*, ModelTensorReshape reshape",
    "ModelQueuePolicy": "bool allow_timeout_override, uint32 max_queue_size",
    "ModelDynamicBatching": "uint64 max_queue_delay_microseconds, ModelQueuePolicy default_queue_policy",
    "ModelInstanceGroup": "int32 count, Kind kind, int32 gpus*",
    "ModelParameter": "string string_value",
    "Parameter": "string key, ModelParameter value",
    "ModelConfig": (
        "string name, string backend, int32 max_batch_size, ModelInput input*, ModelOutput output*, "
        "ModelDynamicBatching dynamic_batching, ModelInstanceGroup instance_group*, Parameter parameters*"
    ),
}


def _message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="model_config_of_the_tests.proto", package="t", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(", "), 1):
            kind, title = field.split()
            label = FIELD.LABEL_REPEATED if title.endswith("*") else FIELD.LABEL_OPTIONAL
            entry = message.field.add(name=title.rstrip("*"), number=number, label=label)
            if kind in SCALARS:
                entry.type = SCALARS[kind]
            else:
                entry.type, entry.type_name = FIELD.TYPE_ENUM if kind in ENUMS else FIELD.TYPE_MESSAGE, f".t.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def parse(text: str) -> dict[str, Any]:
    """The config as plain values; numbers of 64 bits are strings, as in protobuf's JSON."""
    message = text_format.Parse(text, _message_class()())
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
