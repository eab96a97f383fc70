// The fields of a struct of parameters by name, as Python gives them. fastkd/parameters.py has the
// same structs.
#pragma once

namespace fastkd {

template <class Struct, class T>
struct Field {
  const char* name;
  T Struct::* member;
};

template <class Struct, class T>
constexpr Field<Struct, T> field(const char* name, T Struct::* member) {
  return {name, member};
}

}  // namespace fastkd
