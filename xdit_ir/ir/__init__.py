"""The intermediate representation: programs, types, layouts, operators, and what they mean on one device."""
