"""Objects that exist once in a process: a copy of a module that names one shares it."""

from typing import Any, ClassVar, Self, SupportsIndex


class Uncopied:
    """Base class of objects that hold sockets, threads or a private key: ``copy.deepcopy`` returns the object itself,
    and pickling is refused."""

    __slots__ = ()
    _called: ClassVar[str | None] = None
    """The name that users know it by, if that is not its class's."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Raises: TypeError."""
        raise TypeError(
            f"{self._called or 'a ' + type(self).__name__} cannot be pickled, because it holds sockets, threads or a "
            "private key: save the module's state_dict(), and load it into one made with the node of the other program"
        )
