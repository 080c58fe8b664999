from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNKNOWN: _ClassVar[Role]
    SOURCE: _ClassVar[Role]
    DESTINATION: _ClassVar[Role]
ROLE_UNKNOWN: Role
SOURCE: Role
DESTINATION: Role

class Hello(_message.Message):
    __slots__ = ("phaul_version", "protocol", "role", "arch", "page_size", "kernel_release", "features", "cpu_features", "vdso_id", "token", "agent_id")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bool] = ...) -> None: ...
    PHAUL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ARCH_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    KERNEL_RELEASE_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CPU_FEATURES_FIELD_NUMBER: _ClassVar[int]
    VDSO_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    phaul_version: str
    protocol: int
    role: Role
    arch: str
    page_size: int
    kernel_release: str
    features: _containers.ScalarMap[str, bool]
    cpu_features: _containers.RepeatedScalarFieldContainer[str]
    vdso_id: bytes
    token: bytes
    agent_id: bytes
    def __init__(self, phaul_version: _Optional[str] = ..., protocol: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., arch: _Optional[str] = ..., page_size: _Optional[int] = ..., kernel_release: _Optional[str] = ..., features: _Optional[_Mapping[str, bool]] = ..., cpu_features: _Optional[_Iterable[str]] = ..., vdso_id: _Optional[bytes] = ..., token: _Optional[bytes] = ..., agent_id: _Optional[bytes] = ...) -> None: ...

class NeededFile(_message.Message):
    __slots__ = ("path", "size", "build_id")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BUILD_ID_FIELD_NUMBER: _ClassVar[int]
    path: bytes
    size: int
    build_id: bytes
    def __init__(self, path: _Optional[bytes] = ..., size: _Optional[int] = ..., build_id: _Optional[bytes] = ...) -> None: ...

class Preflight(_message.Message):
    __slots__ = ("pids", "tids", "files", "bytes", "shell_job", "tcp_established")
    PIDS_FIELD_NUMBER: _ClassVar[int]
    TIDS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SHELL_JOB_FIELD_NUMBER: _ClassVar[int]
    TCP_ESTABLISHED_FIELD_NUMBER: _ClassVar[int]
    pids: _containers.RepeatedScalarFieldContainer[int]
    tids: _containers.RepeatedScalarFieldContainer[int]
    files: _containers.RepeatedCompositeFieldContainer[NeededFile]
    bytes: int
    shell_job: bool
    tcp_established: bool
    def __init__(self, pids: _Optional[_Iterable[int]] = ..., tids: _Optional[_Iterable[int]] = ..., files: _Optional[_Iterable[_Union[NeededFile, _Mapping]]] = ..., bytes: _Optional[int] = ..., shell_job: _Optional[bool] = ..., tcp_established: _Optional[bool] = ...) -> None: ...

class PreflightReply(_message.Message):
    __slots__ = ("taken", "files")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    taken: _containers.RepeatedScalarFieldContainer[str]
    files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, taken: _Optional[_Iterable[str]] = ..., files: _Optional[_Iterable[str]] = ...) -> None: ...

class ImageFile(_message.Message):
    __slots__ = ("name", "data", "last")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    last: bool
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Staged(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PagesDone(_message.Message):
    __slots__ = ("frames", "bytes")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    bytes: int
    def __init__(self, frames: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Prepared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Commit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Running(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Abort(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("exit_code", "text")
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    exit_code: int
    text: str
    def __init__(self, exit_code: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("hello", "preflight", "preflight_reply", "image_file", "stage", "staged", "pages_done", "finish", "prepared", "commit", "running", "abort", "failed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PREFLIGHT_FIELD_NUMBER: _ClassVar[int]
    PREFLIGHT_REPLY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FILE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    PAGES_DONE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    preflight: Preflight
    preflight_reply: PreflightReply
    image_file: ImageFile
    stage: Stage
    staged: Staged
    pages_done: PagesDone
    finish: Finish
    prepared: Prepared
    commit: Commit
    running: Running
    abort: Abort
    failed: Failed
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., preflight: _Optional[_Union[Preflight, _Mapping]] = ..., preflight_reply: _Optional[_Union[PreflightReply, _Mapping]] = ..., image_file: _Optional[_Union[ImageFile, _Mapping]] = ..., stage: _Optional[_Union[Stage, _Mapping]] = ..., staged: _Optional[_Union[Staged, _Mapping]] = ..., pages_done: _Optional[_Union[PagesDone, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., running: _Optional[_Union[Running, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...
