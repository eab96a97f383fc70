"""Features and logits as torchdistill's hooks hand them to its losses."""


def outputs(*tensors):
    """`[student_io_dict, teacher_io_dict]`: of the first half of tensors, and of the others."""
    half = len(tensors) // 2
    return [
        {str(i): {"output": x} for i, x in enumerate(side)}
        for side in (tensors[:half], tensors[half:])
    ]


def of_modules(*names):
    """The keywords that name an output, `"<name>_path"` and so on: the first module, the second."""
    keywords = {}
    for i, name in enumerate(names):
        for side in ("student", "teacher"):
            keywords[f"{side}_{name}_path"] = str(i)
            keywords[f"{side}_{name}_io"] = "output"
    return keywords


def of_loss(criterion, *arguments):
    """The criterion as a function of the student's tensors and the teacher's."""
    return lambda *tensors: criterion(*outputs(*tensors), *arguments)


def output(i):
    return {"path": str(i), "io": "output"}


AT_PAIRS = {
    "shallow": {"student": output(0), "teacher": output(0)},
    "deep": {"student": output(1), "teacher": output(1), "weight": 0.5},
}
FSP_PAIRS = {
    "first": {
        f"{side}_{end}": output(i)
        for side in ("student", "teacher")
        for i, end in enumerate(("first", "second"))
    },
    "second": {
        "weight": 3,
        **{
            f"{side}_{end}": output(i)
            for side in ("student", "teacher")
            for i, end in ((1, "first"), (2, "second"))
        },
    },
}
