// The same in C++: owners instead of handles, views instead of pointers, an exception for each error.
#include <cellstep/runtime.hpp>
#include <cstdio>
#include <iostream>
#include <vector>

using namespace cellstep::runtime;

int main(int argc, char** argv) try {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s MODEL.cellstep < WINDOW\n", argv[0]);
        return 2;
    }
    std::vector<float> x;
    for (float value; std::cin >> value; std::cin.ignore(std::cin.peek() == ',')) x.push_back(value);

    Model model;
    Session session;
    check(model.load(argv[1]));
    check(session.create(model));
    std::vector<float> y(model.info().output_size);
    check(session.forecast(x, y));
    for (const float value : y) std::printf("%.9g\n", static_cast<double>(value));
    return 0;
} catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
