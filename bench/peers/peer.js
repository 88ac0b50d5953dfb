// The four measures of bench/peers in Node. Prints one `measure nanoseconds` a line.
// A switch is an await of nothing; a task is a call of an async function.
'use strict';

const yields = 1000000;
const tasks = 500000;
const inputs = 300000;
const callbacks = 500000;

async function yielder() {
    for (let i = 0; i < yields / 2; i++) await null;
}

async function switches() {
    await Promise.all([yielder(), yielder()]);
}

async function addOne(n) {
    return n + 1;
}

async function spawn() {
    let n = 0;
    for (let i = 0; i < tasks; i++) n = await addOne(n);
}

async function all() {
    const tickets = [];
    const futures = [];
    for (let i = 0; i < inputs; i++) futures.push(new Promise((settle) => tickets.push(settle)));
    const joined = Promise.all(futures);
    for (let i = 0; i < inputs; i++) tickets[i](i);
    await joined;
}

async function oneshot() {
    let calls = 0;
    let settle = null;
    for (let i = 0; i < callbacks; i++) {
        new Promise((resolve) => { settle = resolve; }).then(() => { calls++; });
        settle(1);
        if (i % 100 === 99) await null;
    }
    await null;
}

async function report(what, measure, count) {
    await measure();
    const start = process.hrtime.bigint();
    await measure();
    const ns = Number(process.hrtime.bigint() - start) / count;
    console.log(`${what} ${ns.toFixed(1)}`);
}

(async () => {
    await report('switch', switches, yields);
    await report('spawn', spawn, tasks);
    await report('all', all, inputs);
    await report('oneshot', oneshot, callbacks);
})();
